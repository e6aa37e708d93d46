-- Recover what is overdue: lost holders, lost messages, parked nodes whose time has come, a deadline.
-- ARGV: grace_ms, lease_ms, stop_grace_ms, at most.
-- Returns {state, ms at which to look again, node ids to send again ...}.
local f = facts()
if not f then return {'unknown', 0} end
if TERMINAL[f.state] then return {f.state, 0} end
local grace, lease = tonumber(ARGV[1]), tonumber(ARGV[2])
keep_all(f.ttl_s)
judge(f)
local send = {}
if f.stop ~= '' and f.state ~= 'merging' then
  skip_waiting(f, now > tonumber(call('HGET', job, 'stop_ms')) + tonumber(ARGV[3]))
  if f.pending <= 0 then
    local outcome, waits = finish_tree(f, grace, call('HGET', job, 'task'))
    if outcome == 'closed' then return {f.state, 0} end
    send[1] = waits
  end
end
for _, id in ipairs(call('ZRANGEBYSCORE', due, '-inf', now, 'LIMIT', 0, ARGV[4])) do
  local node = read(id)
  if node then
    if node.s == 'q' then node.rs = node.rs + 1 else node.rs = 0 end
    if node.s == 'r' then
      call('HDEL', inflight, id)
      note('lease lost', 'node ' .. id)
    end
    node.s, node.why = 'q', node.s == 'r' and 'its lease ran out' or node.why
    write(id, node)
    -- A queue may simply be long: each further copy of a message waits twice as long as the one before.
    call('ZADD', due, now + grace * 2 ^ math.min(node.rs, 10), id)
    send[#send + 1] = id
  end
end
local first = call('ZRANGE', due, 0, 0, 'WITHSCORES')
local again = math.min(tonumber(first[2] or now) , now + lease)
if f.deadline > 0 then again = math.min(again, f.deadline) end
if f.stop ~= '' then again = math.min(again, now + tonumber(ARGV[3])) end
return {f.state, math.max(again, now + 50), unpack(send)}
