-- Read the recurring faults at the server's time, which tells whose window is over.
-- KEYS[1]: patterns hash.  Returns {now in ms, {field, value, ...}}.
local t = redis.call('TIME')
return {tonumber(t[1]) * 1000 + math.floor(tonumber(t[2]) / 1000), redis.call('HGETALL', KEYS[1])}
