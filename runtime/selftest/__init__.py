"""Does knnmoe compute here what it should: `python -m knnmoe.runtime.selftest`.

It needs the base install alone. The bundle in this folder is that of a tiny random model, and
`known.json` what transformers computes of it.
"""
