-- uses: clock
-- Return the ms until the first job is due for a sweep, -1 when none is.
-- KEYS[1]: index of due jobs.
local first = redis.call('ZRANGE', KEYS[1], 0, 0, 'WITHSCORES')
if not first[2] then return -1 end
return math.max(0, math.floor(tonumber(first[2]) - now_ms()))
