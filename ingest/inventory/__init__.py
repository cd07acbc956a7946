"""What resources there are, how large they are, and since when: CloudWatch knows no sizes, so something else has to say it."""
