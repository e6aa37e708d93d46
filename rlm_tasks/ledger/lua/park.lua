-- Park a claimed node; if its job is ending, the node is skipped.
-- ARGV: node, token, ms to wait, reason, number of failures of its first item.
-- Returns '', or the id of a node that now waits for its message.
local id, f, node = ARGV[1], facts(), held(ARGV[1], ARGV[2])
if not f or not node then return '' end
judge(f)
if f.stop ~= '' and not (id == 'merge' and MERGES[f.stop]) then
  skip_nodes(f, {id}, {[id] = node})
  skip_waiting(f, false)
  if f.pending > 0 then return '' end
  local _, waits = finish_tree(f, call('HGET', job, 'task'))
  return waits
end
node.s, node.why, node.lost = 'p', ARGV[4], nil
node.wt, node.tr = 1, tonumber(ARGV[5]) > 0 and tonumber(ARGV[5]) or nil
write(id, node)
count_parked(node.why, 1)
call('HDEL', inflight, id)
call('ZREM', waiting, id)
call('ZADD', due, now + tonumber(ARGV[3]), id)
keep(due)
return ''
