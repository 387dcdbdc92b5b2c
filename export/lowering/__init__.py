"""What the parts of a model become for one kind of runtime."""
