-- Release a node whose holder is gone.
-- ARGV: node, token, item in flight (-1: none, -2: one of several), cause of the process's death
-- ('' when it did not die), 1 when the item must not run again.
-- Returns 1, or 0 when the holder had finished or was replaced.
local id, item, f, node = ARGV[1], tonumber(ARGV[3]), facts(), held(ARGV[1], ARGV[2])
if not f or not node then return 0 end
node.k, node.why, node.lost = '', 'its worker process was lost', nil
if ARGV[4] ~= '' then
  if item == -1 then
    node.lost, node.by = true, ARGV[4]
  elseif item == -2 then
    node.one = (node.one or 0) + 1
  else
    count_death(item, node.one or 0, ARGV[4], ARGV[5] == '1')
    node.one = nil
  end
end
call('HDEL', inflight, id)
wait_for_message(id, node)
keep(waiting)
note('released', 'node ' .. id)
return 1
