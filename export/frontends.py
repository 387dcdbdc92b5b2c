"""Ways to find out what a checkpoint is: by the description of its family, or by tracing it."""

DESCRIPTION, TORCH = FRONTENDS = ("description", "torch")
# Families without a description that tests trace, by their model type.
TRACED_FAMILIES = ("ernie4_5_moe", "flex_olmo", "granitemoe", "hunyuan_v1_moe", "minimax_m2")
TRACED_PRECISIONS = ("fp32", "fp16")  # of bundles whose checkpoint was traced
