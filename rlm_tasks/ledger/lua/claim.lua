-- Claim a node.
-- ARGV: node, token, lease_ms, worker, death_limit, schema, number of the message that led here,
-- largest number of failed items in range.
-- Returns {answer, ...}; the answers done, busy, parked, newer and unknown have nothing more.
-- run: epoch, record, phase, spec, suspects, failed items in range (see failed_in), ms left (-1: no limit).
-- cut: ids of children that still wait for a message.
-- closed: at most the id of a node that now waits for its message.
local id, token, lease, limit = ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[5])
local f = facts()
local node = f and read(id)
if not node then return {'unknown'} end
if f.schema > tonumber(ARGV[6]) then return {'newer'} end
if TERMINAL[f.state] then return {'closed'} end
if node.s == 'd' or node.s == 'k' then return {'done'} end
if node.s == 'c' then
  local unsent, kids = {'cut'}, read_all(node.kids or {})
  for _, child in ipairs(node.kids or {}) do
    if kids[child] and kids[child].s == 'q' then unsent[#unsent + 1] = child end
  end
  return unsent
end
local at = node.s ~= 'q' and tonumber(call('ZSCORE', due, id) or '0') or 0
local again = node.s == 'r' and node.k == token
if node.s == 'r' and at > now and not again then return {'busy'} end
if node.s == 'p' and at > now then return {'parked'} end
judge(f)
if f.stop ~= '' and id ~= 'merge' then
  skip_nodes(f, {id}, {[id] = node})
  skip_waiting(f, false)
  if f.pending > 0 then return {'closed'} end
  local outcome, waits = finish_tree(f, call('HGET', job, 'task'))
  return {'closed', waits}
end

local sent = tonumber(call('ZSCORE', waiting, id) or '0')
call('ZREM', waiting, id)
-- When a message has arrived, those sent before it should have arrived, too (see sweep).
-- Only the send time of the node's latest message is known, so an earlier copy does not count.
if node.m ~= tonumber(ARGV[7]) then sent = 0 end
call('HSET', job, 'claimed_ms', now, 'seen_ms', math.max(f.seen_ms, sent))
if node.s == 'r' and not again then node.lost, node.by = true, 'the loss of its worker' end
if node.lost then
  node.lost, node.x = nil, (node.x or 0) + 1
  if id ~= 'merge' and node.hi - node.lo == 1 then count_death(node.lo, 0, node.by) end
end
if not again then node.e = node.e + 1 end
if node.s == 'p' then count_parked(node.why, -1) end
node.s, node.k, node.w, node.at, node.why = 'r', token, ARGV[4], now, ''
write(id, node)
call('ZADD', due, now + lease, id)
if f.state == 'pending' then
  keep(due)
  call('HSET', job, 'state', 'running', 'started_ms', now)
  note('started')
end
local suspects, known = {}, {}
if id ~= 'merge' then
  local all = call('HGETALL', deaths)
  for i = 1, #all, 2 do
    local index = tonumber(all[i])
    if index >= node.lo and index < node.hi then
      local death = cjson.decode(all[i + 1])
      suspects[#suspects + 1] = {index, death.n, death.by, death.over or death.n >= limit}
    end
  end
  if f.phase == 'process' and f.failed > 0 then known = failed_in(node.lo, node.hi, ARGV[8]) end
end
return {'run', node.e, cjson.encode(node), f.phase, call('HGET', job, 'spec'),
  cjson.encode(suspects), known, f.deadline > 0 and f.deadline - now or -1}
