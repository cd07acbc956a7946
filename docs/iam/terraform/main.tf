# The role that Headgate assumes in an account it reads: a module, applied once in each account. It may read metrics, and tags and sizes
# of resources where asked for; it can change and delete nothing. The policy is the file that the CloudFormation template and our tests hold to.

terraform {
  required_version = ">= 1.3"
  required_providers {
    aws = {
      source  = "hashicorp/aws"
      version = ">= 4.0"
    }
  }
}

variable "exporter_role_arn" {
  type        = string
  description = "The role that Headgate's exporters run as; only it may assume this one."
}

variable "coordinator_role_arn" {
  type        = string
  default     = ""
  description = "The role that Headgate's coordinator runs as, where it is another and inventory.source is describe. It may assume this one, too."
}

variable "external_id" {
  type        = string
  sensitive   = true
  description = "A text of your choice, the same as external_id in headgate.yaml."

  validation {
    condition     = length(var.external_id) >= 8
    error_message = "Without an ExternalId of 8 characters or more others could have Headgate read this account."
  }
}

variable "role_name" {
  type        = string
  default     = "headgate"
  description = "As in aws.role_template of headgate.yaml."
}

variable "read_tags" {
  type        = bool
  default     = true
  description = "Whether services are selected by resource tags (only, tags), or their series named after resources in Prometheus (remote_write)."
}

variable "read_inventory" {
  type        = bool
  default     = false
  description = "Whether types, sizes and states of resources are read for the report (inventory.source is describe)."
}

locals {
  policy = jsondecode(file("${path.module}/../policies/target.json"))
  wanted = {
    HeadgateReadsTags      = var.read_tags
    HeadgateReadsInventory = var.read_inventory
  }
  statements = [for s in local.policy.Statement : s if lookup(local.wanted, s.Sid, true)]
}

resource "aws_iam_role" "headgate" {
  name                 = var.role_name
  description          = "Headgate reads CloudWatch metrics by it."
  max_session_duration = 3600

  assume_role_policy = jsonencode({
    Version = "2012-10-17"
    Statement = [{
      Effect    = "Allow"
      Principal = { AWS = compact([var.exporter_role_arn, var.coordinator_role_arn]) }
      Action    = "sts:AssumeRole"
      Condition = { StringEquals = { "sts:ExternalId" = var.external_id } }
    }]
  })
}

resource "aws_iam_role_policy" "headgate" {
  name   = "headgate"
  role   = aws_iam_role.headgate.name
  policy = jsonencode({ Version = local.policy.Version, Statement = local.statements })
}

output "role_arn" {
  description = "For role_arn in headgate.yaml, where aws.role_template is not used."
  value       = aws_iam_role.headgate.arn
}
