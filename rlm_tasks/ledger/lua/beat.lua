-- Keep a node's lease, or renew one that ran out while nobody took the node.  ARGV: node, token, lease_ms.
-- Returns 1, or 0 when somebody else has it.
local id, node = ARGV[1], held(ARGV[1], ARGV[2])
if not node then return 0 end
if node.lost then
  node.s, node.lost, node.why = 'r', nil, ''
  write(id, node)
  call('ZREM', waiting, id)
end
call('ZADD', due, now + tonumber(ARGV[3]), id)
return 1
