"""What Headgate's own parts cost, and what it is compared with: the `prices` section of headgate.yaml.

The defaults are AWS's list prices on demand in us-east-1, as of 2026. Other regions, contracts and discounts differ: set yours. What CloudWatch's API
costs stands in `aws`, for it is what budgets go by.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class PriceList(BaseModel):
    """US dollars; a GB is 10**9 bytes, a month 30.4 days."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    s3_usd_per_1000_puts: float = Field(0.005, ge=0)
    """S3 Standard; LIST costs the same."""
    s3_usd_per_1000_gets: float = Field(0.0004, ge=0)
    s3_usd_per_gb_month: float = Field(0.023, ge=0)
    """The first 50 TB."""
    kafka_brokers: int = Field(3, ge=1)
    kafka_usd_per_broker_hour: float = Field(0.204, ge=0)
    """MSK kafka.m7g.large. MSK Serverless: one broker at 0.75, and the price of a partition."""
    kafka_usd_per_partition_hour: float = Field(0, ge=0)
    """MSK with brokers bills none; MSK Serverless 0.0015."""
    kafka_usd_per_gb_month: float = Field(0.10, ge=0)
    kafka_usd_per_gb_in: float = Field(0, ge=0)
    """MSK Serverless 0.10."""
    kafka_usd_per_gb_out: float = Field(0, ge=0)
    """MSK Serverless 0.05."""
    postgres_usd_per_hour: float = Field(0.168, ge=0)
    """RDS for PostgreSQL db.m7g.large, one availability zone."""
    postgres_usd_per_gb_month: float = Field(0.115, ge=0)
    """gp3, one availability zone."""
    endpoints: int = Field(4, ge=0)
    """VPC interface endpoints, by availability zone: CloudWatch and STS in two."""
    endpoint_usd_per_hour: float = Field(0.01, ge=0)
    endpoint_usd_per_gb: float = Field(0.01, ge=0)
    """The first PB. By way of a NAT gateway instead: 1 endpoint at 0.045, and 0.045."""
    stream_usd_per_1000_updates: float = Field(0.003, ge=0)
    """Metric Streams, for the comparison."""
    firehose_usd_per_gb: float = Field(0.029, ge=0)
    """Firehose, the first 500 TB, for the comparison."""
