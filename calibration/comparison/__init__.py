"""What a memory is worth on a user's own text, beside the alternatives and the controls."""
