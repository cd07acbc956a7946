"""What `headgate doctor` knows of a release in Kubernetes: what was seen, and what is wrong. All but `cluster` is pure."""
