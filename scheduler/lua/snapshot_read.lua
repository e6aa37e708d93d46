-- Return {the snapshots of an operation, newest first; s since when it is slower or ''}.
-- KEYS: its snapshots (LIST), operations that became slower (HASH).   ARGV: operation.
return {redis.call('LRANGE', KEYS[1], 0, -1), redis.call('HGET', KEYS[2], ARGV[1]) or ''}
