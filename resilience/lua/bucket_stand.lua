-- Let a waiter stand in the line of a pause.  KEYS[1]: line.  ARGV: waiter, urgency, ms to keep the
-- line.
redis.call('ZADD', KEYS[1], 'NX', ARGV[2], ARGV[1])
if redis.call('PTTL', KEYS[1]) < tonumber(ARGV[3]) then redis.call('PEXPIRE', KEYS[1], ARGV[3]) end
return 1
