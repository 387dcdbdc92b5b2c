"""Ways to find out what a checkpoint is: by the description of its family, or by tracing it."""

DESCRIPTION, TORCH = FRONTENDS = ("description", "torch")
TRACED_PRECISIONS = ("fp32", "fp16")  # of bundles whose checkpoint was traced
