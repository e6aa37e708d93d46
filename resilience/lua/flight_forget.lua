-- Drop what is kept.  KEYS: it.
redis.call('DEL', KEYS[1])
