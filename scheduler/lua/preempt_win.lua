-- Take a token, for which the caller must yield.
-- Returns 1, or 0 if there is a slot for each node whose grace is over.
if redis.call('ZCOUNT', KEYS[1], '-inf', now) - won - coming <= 0 then return 0 end
won = won + 1
keep()
return 1
