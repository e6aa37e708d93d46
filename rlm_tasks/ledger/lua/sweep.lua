-- Recover a job's overdue nodes (lost holders, lost messages, parked nodes), and keep its deadline.
-- ARGV: grace_ms, lease_ms, stop_grace_ms, largest number of nodes, schema.
-- Returns {state, time of the next sweep in ms, ids of nodes to send again ...}.
local f = facts()
if not f then
  -- The job has expired, or was evicted: what is left of it is of no use.
  call('UNLINK', unpack(KEYS))
  return {'unknown', 0}
end
if TERMINAL[f.state] then return {f.state, 0} end
local grace, lease, most = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[4])
-- A worker of the newer version sweeps it; the next check is soon, in case that worker has died.
if f.schema > tonumber(ARGV[5]) then return {'newer', now + 1000} end
keep(unpack(KEYS))
-- Each pending node is in `due` or in `waiting`, and has a record.  A server that evicts keys, or was
-- restored in part, may have lost some: such a job cannot end by itself.
local function lost()
  local message = 'records of its nodes are gone from Redis, as after an eviction; submit it again'
  call('HSETNX', job, 'error', cjson.encode({type = 'LedgerError', traceback = '', message = message}))
  stop(f, 'failed', 'records of its nodes are gone')
  call('HSET', job, 'skipped', f.n - f.done - f.failed, 'pending', 0)
  close(f, 'failed')
  return {f.state, 0}
end
if f.pending > call('ZCARD', due) + call('ZCARD', waiting) then return lost() end
judge(f)
local send = {}
local function send_again(id, node)
  wait_for_message(id, node)
  send[#send + 1] = id
end

local merging = f.state == 'merging'
-- Answers on their way are paid for, so a spent budget lets running nodes finish.
local finishes = f.stop == 'budget' or merging and MERGES[f.stop]
if finishes and f.deadline > 0 and now >= f.deadline then stop(f, 'expired') end
if f.stop ~= '' and not (merging and MERGES[f.stop]) then
  skip_waiting(f, f.stop ~= 'budget' and now > tonumber(call('HGET', job, 'stop_ms')) + tonumber(ARGV[3]))
  if f.pending <= 0 then
    local outcome, waits = finish_tree(f, call('HGET', job, 'task'))
    if outcome == 'closed' then return {f.state, 0} end
    send[1] = waits
  end
end

for _, id in ipairs(call('ZRANGEBYSCORE', due, '-inf', now, 'LIMIT', 0, most)) do
  local node = read(id)
  if not node then return lost() end
  if node.s == 'r' then
    node.lost, node.by, node.why = true, 'the loss of its worker', 'its lease ran out'
    call('HDEL', inflight, id)
    note('lease lost', 'node ' .. id)
  end
  node.rs = 0
  send_again(id, node)
end

-- A queue keeps its order: a message is lost if one that was sent well after it has arrived first.
-- Copies of one node back off, because a busy worker may have prefetched its message.
local overdue = call('ZRANGEBYSCORE', waiting, '-inf', now - grace, 'WITHSCORES', 'LIMIT', 0, most)
for i = 1, #overdue, 2 do
  local id, sent = overdue[i], tonumber(overdue[i + 1])
  if sent >= f.seen_ms - grace / 2 or #send >= most then break end
  local node = read(id)
  if not node then return lost() end
  if now - sent >= grace * 2 ^ math.min(node.rs, 10) then
    node.rs = node.rs + 1
    send_again(id, node)
  end
end
-- When no message arrives, the queue may be long or gone: a copy of the oldest message probes it.
local v = call('HMGET', job, 'claimed_ms', 'probed_ms', 'probes')
local claimed, probed, probes = tonumber(v[1]), tonumber(v[2]), tonumber(v[3])
if claimed > probed then probes = 0 end
local quiet_until = math.max(claimed, probed) + grace * 2 ^ math.min(probes, 10)
if #send == 0 and #overdue > 0 and now >= quiet_until then
  quiet_until = now + grace * 2 ^ math.min(probes + 1, 10)
  call('HSET', job, 'probed_ms', now, 'probes', probes + 1)
  local node = read(overdue[1])
  if not node then return lost() end
  node.rs = node.rs + 1
  send_again(overdue[1], node)
end

if #send > 0 then keep(waiting) end
local first = call('ZRANGE', due, 0, 0, 'WITHSCORES')
local again = now + lease
if call('ZCARD', waiting) > 0 then again = math.min(again, math.max(quiet_until, now + grace)) end
if first[2] then again = math.min(again, tonumber(first[2])) end
if f.deadline > 0 then again = math.min(again, f.deadline) end
if f.start_by > 0 and f.state == 'pending' then again = math.min(again, f.start_by) end
if f.stop ~= '' then again = math.min(again, now + tonumber(ARGV[3])) end
if #send >= most then again = now end
return {f.state, math.max(again, now + 50), unpack(send)}
