-- Take the turn to look.  KEYS[1]: turn.  ARGV: worker, ms for which nobody else gets it.   Returns now in ms, or 0.
if not redis.call('SET', KEYS[1], ARGV[1], 'NX', 'PX', ARGV[2]) then return 0 end
local t = redis.call('TIME')
return tonumber(t[1]) * 1000 + math.floor(tonumber(t[2]) / 1000)
