-- Close a node: store its partial and register its children; exactly one caller gets the outcome.
-- ARGV: node, token, report (JSON: mid, done, failed, failed_ranges, skipped, failures, quarantined, splits,
-- shaped, why, busy_us, peak_kb), partial ('' when there is none), lease_ms, number of children,
-- depth of the deepest one, for each child its id, first item, end, ms to wait (-1: none) and record,
-- and for each further partial its first item and itself.
-- Returns {answer, children registered, outcome, waiting node}: answer ok | stale;
-- outcome '' | merge | process | closed.  With merge, the caller holds the root merge.
local id, token, blob, lease = ARGV[1], ARGV[2], ARGV[4], tonumber(ARGV[5])
local f, node = facts(), read(id)
if not f or not node then return {'stale', 0, '', ''} end
if node.k == token and (node.s == 'c' or node.s == 'd') then
  local merge = read('merge')
  if merge and merge.s == 'r' and merge.k == token then return {'ok', 0, 'merge', 'merge'} end
  return {'ok', node.s == 'c' and 1 or 0, '', ''}
end
if not held(id, token, node) then return {'stale', 0, '', ''} end

local r = cjson.decode(ARGV[3])
local at, kids, behind = r.mid, {}, 8 + 5 * ARGV[6]
for i = 8, behind - 1, 5 do
  local lo, hi = tonumber(ARGV[i + 1]), tonumber(ARGV[i + 2])
  if lo ~= at or hi <= lo then
    return redis.error_reply('TILING node ' .. id .. ': a part starts at ' .. lo .. ', not at ' .. at)
  end
  at, kids[#kids + 1] = hi, ARGV[i]
end
if at ~= node.hi then
  return redis.error_reply('TILING node ' .. id .. ': its parts end at ' .. at .. ', not at ' .. node.hi)
end
local taken = next(read_all(kids))
if taken then
  return redis.error_reply('TAKEN node ' .. id .. ': a part has the id of another node, ' .. taken)
end

if r.mid > node.lo and f.phase == 'process' then
  local from = node.lo
  local function store(to)
    local range = from .. ':' .. to
    call('ZADD', pieces, from, range)
    if blob ~= '' then call('HSET', blobs, range, blob) end
  end
  for i = behind, #ARGV, 2 do
    store(ARGV[i])
    from, blob = ARGV[i], ARGV[i + 1]
  end
  store(r.mid)
  if f.done == 0 then keep(pieces, blobs) end
end
local function add_all(key, indexes)
  local members = {}
  for i, index in ipairs(indexes) do
    members[#members + 1] = index
    members[#members + 1] = index
    if #members == 2 * PAGE or i == #indexes then
      call('ZADD', key, unpack(members))
      members = {}
    end
  end
end
local bad = #r.failed
add_all(failed, r.failed)
for _, range in ipairs(r.failed_ranges) do
  call('ZADD', failed, range[1], range[1] .. ':' .. range[2])
  bad = bad + range[2] - range[1]
end
if #r.failed_ranges > 0 then call('HSET', job, 'failed_ranges', 1) end
add_all(empty, r.skipped)
if #r.skipped > 0 then keep(empty) end
local room = #r.failures > 0 and MAX_FAILURES - call('HLEN', failures) or 0
for i, failure in ipairs(r.failures) do
  if i > room then break end
  call('HSET', failures, failure[1], failure[2])
end
for _, entry in ipairs(r.quarantined) do
  call('HSET', quarantine, entry[1], entry[2])
  keep(quarantine)
  call('HDEL', deaths, entry[1])
  note('quarantined', 'item ' .. entry[1])
end
if bad > 0 then
  keep(failed, failures)
  f.failed = call('HINCRBY', job, 'failed', bad)
end
if f.phase == 'process' then
  f.done = call('HINCRBY', job, 'done', r.done)
  if #r.skipped > 0 then call('HINCRBY', job, 'skipped', #r.skipped) end
else
  call('HINCRBY', job, 'validated', r.mid - node.lo)
end
for _, entry in ipairs(r.shaped or {}) do
  call('HINCRBY', job, 'shaped:' .. entry[1] .. ':' .. entry[2], entry[3])
end
call('HINCRBY', job, 'nodes', 1)
call('HINCRBY', job, 'busy_us', r.busy_us)
if r.peak_kb > f.peak_kb then call('HSET', job, 'peak_kb', r.peak_kb) end
judge(f)

retire(id)
if #kids > 0 and f.stop ~= '' then
  if f.phase == 'process' then call('HINCRBY', job, 'skipped', unfailed(f, r.mid, node.hi)) end
  kids = {}
elseif #kids > 0 then
  local ids, texts = {}, {}
  for i = 8, behind - 1, 5 do
    local wait_ms = tonumber(ARGV[i + 3])
    if wait_ms >= 0 then
      park_node(ARGV[i], ARGV[i + 4], now + wait_ms)
    else
      ids[#ids + 1] = ARGV[i]
      texts[#ids] = ARGV[i + 4]
    end
  end
  queue_nodes(ids, texts)
  keep(due, waiting)
  for _, split in ipairs(r.splits) do call('HSET', splits, split.id, cjson.encode(split)) end
  if #r.splits > 0 then
    call('HINCRBY', job, 'splits', #r.splits)
    keep(splits)
  end
  if #kids == 1 then call('HINCRBY', job, 'yields', 1) end
  if tonumber(ARGV[7]) > tonumber(call('HGET', job, 'depth')) then call('HSET', job, 'depth', ARGV[7]) end
end
node.s, node.mid, node.why, node.ms, node.lost = #kids > 0 and 'c' or 'd', r.mid, r.why, now - node.at, nil
node.kids = #kids > 0 and kids or nil
write(id, node)
if id ~= 'root' then keep_records(f, {id}) end
f.pending = call('HINCRBY', job, 'pending', #kids - 1)
if f.stop ~= '' then skip_waiting(f, false) end
if f.pending > 0 then return {'ok', #kids > 0 and 1 or 0, '', ''} end

local outcome, waits = finish_tree(f, call('HGET', job, 'task'))
if outcome == 'merge' then
  local merge = read('merge')
  merge.s, merge.e, merge.k, merge.w, merge.at = 'r', 1, token, node.w, now
  write('merge', merge)
  call('ZREM', waiting, 'merge')
  call('ZADD', due, now + lease, 'merge')
  keep(due)
  return {'ok', 0, 'merge', 'merge'}
end
return {'ok', 0, outcome, waits}
