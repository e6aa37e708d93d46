-- Drop a memo.  KEYS[1]: memo.
redis.call('DEL', KEYS[1])
