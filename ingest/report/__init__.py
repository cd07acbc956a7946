"""The utilization, cost and capacity report: what is used, what it costs, when it is full."""
