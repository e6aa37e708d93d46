-- The snapshots of an operation, newest first, and since when it is slower ('': it is not).
-- KEYS: its snapshots (LIST), operations that became slower (HASH).   ARGV: operation.
return {redis.call('LRANGE', KEYS[1], 0, -1), redis.call('HGET', KEYS[2], ARGV[1]) or ''}
