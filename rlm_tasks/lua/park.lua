-- Let a claimed node wait.  ARGV: node, epoch, ms to wait, reason.   Returns 1, or 0 when the caller was replaced.
local id, node = ARGV[1], read(ARGV[1])
if not node or node.s ~= 'r' or node.e ~= tonumber(ARGV[2]) then return 0 end
node.s, node.why = 'p', ARGV[4]
write(id, node)
call('HDEL', inflight, id)
call('ZADD', due, now + tonumber(ARGV[3]), id)
return 1
