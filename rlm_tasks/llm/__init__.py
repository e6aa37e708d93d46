"""Work with language models: one prompt an item, merges in a tree, questions over long texts.

The engine calls its operations.  Limits of requests and tokens, breakers and the job's budget are
shared by all workers, and each call must pass them.  Begin with `operations`, then `gate`.
"""
