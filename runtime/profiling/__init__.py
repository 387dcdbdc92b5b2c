"""What a step costs, part by part."""
