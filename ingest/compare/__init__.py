"""Another exporter beside Headgate: what differs, and why. The way is lines, state and store, steps, labels, proof, report."""
