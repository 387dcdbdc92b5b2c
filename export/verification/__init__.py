"""Does a bundle compute what transformers computes?

verify        runs both on random tokens and compares them
cases         the pieces in which sequences are fed, and what a run of one gives
bundle_runs   the bundle, its segments and its frozen gate graph
reference     transformers, each sequence alone, whole and without a cache
differences   how far the two are apart, and which positions can be compared

torch and transformers are imported only when a verification is asked for.
"""
