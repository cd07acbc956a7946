"""What is collected, and by whom: configuration, plan and price. Pure, but for reading files."""
