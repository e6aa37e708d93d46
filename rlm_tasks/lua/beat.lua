-- Keep a running node's lease.  ARGV: node, epoch, lease_ms.   Returns 1, or 0 when it is held no longer.
local node = read(ARGV[1])
if not node or node.s ~= 'r' or node.e ~= tonumber(ARGV[2]) then return 0 end
call('ZADD', due, 'XX', now + tonumber(ARGV[3]), ARGV[1])
return 1
