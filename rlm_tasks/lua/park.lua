-- Let a claimed node wait.  ARGV: node, token, ms to wait, reason, how often its first item has failed.
-- Returns 1, or 0 when the caller was replaced.
local id, node = ARGV[1], held(ARGV[1], ARGV[2])
if not node then return 0 end
node.s, node.why, node.lost = 'p', ARGV[4], nil
node.wt, node.tr = 1, tonumber(ARGV[5]) > 0 and tonumber(ARGV[5]) or nil
write(id, node)
call('HDEL', inflight, id)
call('ZREM', waiting, id)
call('ZADD', due, now + tonumber(ARGV[3]), id)
return 1
