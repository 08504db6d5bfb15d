"""An independent reading of the algorithm, for tests: plain torch, plain loops, no engine code.

Nothing here imports `elastic_cache`; what the engine does is compared with it step by step.
"""
