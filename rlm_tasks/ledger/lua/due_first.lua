-- uses: clock
-- Say in how many ms the first job wants a sweep, and -1 when none does.  KEYS[1]: index of due jobs.
local first = redis.call('ZRANGE', KEYS[1], 0, 0, 'WITHSCORES')
if not first[2] then return -1 end
return math.max(0, math.floor(tonumber(first[2]) - now_ms()))
