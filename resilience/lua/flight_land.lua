-- Land.  KEYS: ..., then each place that keeps the value (a memo, the cache).
-- ARGV: id ('': the value is only kept, waiters do not get it), value, then for each place the ms
-- to keep it.
-- A late landing serves the waiters, and leaves the call to its new holder.
local m = call('HMGET', made, 'holder', 'waiting')
if ARGV[1] ~= '' and tonumber(m[2] or '0') > 0 then
  call('HSET', landed, 'id', ARGV[1], 'value', ARGV[2])
  call('PEXPIRE', landed, KEEP_MS)
  call('HDEL', made, 'waiting')
end
if m[1] == ARGV[1] then call('DEL', made) end
for i = 3, #KEYS do call('SET', KEYS[i], ARGV[2], 'PX', ARGV[i]) end
