-- Give a node back whose holder is gone.  ARGV: node, epoch, item in flight (-1: none), deaths to count for it,
-- grace_ms.   Returns 1, or 0 when the holder had finished or was replaced.
local id, f, node = ARGV[1], facts(), read(ARGV[1])
if not f or not node or node.s ~= 'r' or node.e ~= tonumber(ARGV[2]) then return 0 end
node.s, node.why = 'q', 'its worker process was lost'
write(id, node)
call('HDEL', inflight, id)
call('ZADD', due, now + tonumber(ARGV[5]), id)
if tonumber(ARGV[3]) >= 0 then
  call('HINCRBY', deaths, ARGV[3], ARGV[4])
  call('EXPIRE', deaths, f.ttl_s)
end
note('released', 'node ' .. id)
return 1
