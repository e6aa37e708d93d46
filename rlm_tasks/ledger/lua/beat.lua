-- Renew a node's lease; one that ran out is renewed if no other process has claimed the node.
-- ARGV: node, token, lease_ms.   Returns 1, or 0 when the token holds the node no longer.
local id, node = ARGV[1], held(ARGV[1], ARGV[2])
if not node then return 0 end
if node.lost then
  node.s, node.lost, node.why = 'r', nil, ''
  write(id, node)
  call('ZREM', waiting, id)
end
call('ZADD', due, now + tonumber(ARGV[3]), id)
keep(due)
return 1
