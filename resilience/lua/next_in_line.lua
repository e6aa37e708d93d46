-- Take the first waiters out of a line.  KEYS[1]: line.  ARGV: their number.   Returns the waiters.
local waiters, popped = {}, redis.call('ZPOPMIN', KEYS[1], ARGV[1])
for i = 1, #popped, 2 do waiters[#waiters + 1] = popped[i] end
return waiters
