"""Work with language models: a prompt per item, a tree of merges, a question over more than fits
into a context.

What a call must pass is shared by all workers: limits by requests and tokens, breakers, and the
budget of its job."""
