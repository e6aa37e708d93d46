-- uses: clock
-- The ledger's shared steps.  KEYS: the fields of resilience.keys.JobKeys, in order.
--
-- A node's record (JSON in `nodes`):
--   s       state: q queued, r running, p parked, d done, c cut, k skipped
--   e       epoch, raised by each claim
--   lo, hi  its range
--   mid     end of the items that it ran
--   d       depth
--   p       parent node
--   sp, ix  the split and slot that it fills ('' at the root)
--   t       Celery task id
--   k       token of its holder
--   w       worker
--   at      time of its claim, ms
--   ms      its running time
--   why     the reason why it waits or was cut
--   m       number of its latest message
--   rs      number of copies that were sent because the message was late
--   lost    its holder is gone, and no other process has claimed it since
--   x       number of holders that were lost outside of an item
--   by      cause of the latest of these losses
--   tr      number of failures of its first item, which is left for another try
--   wt      it was parked, so it has waited for its turn
--   one     number of deaths with several items in flight: the next holder runs one item at a time
local job, nodes, due, waiting, splits, pieces, blobs = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6], KEYS[7]
local failed, empty, failures, deaths, quarantine = KEYS[8], KEYS[9], KEYS[10], KEYS[11], KEYS[12]
local inflight, events, items, blocks, ended = KEYS[13], KEYS[14], KEYS[15], KEYS[16], KEYS[17]
local call = redis.call
local MAX_FAILURES, MAX_EVENTS, PAGE = 1000, 1000, 250
-- The keys of an open job live for this long after its last sweep; `ttl_s` begins at its end.
local OPEN_S = 30 * 86400
-- Reasons to wait that are counted apart: the job's hash has no more fields than this.
local MAX_FIELDS, OTHER_REASONS = 200, 'why:other reasons'

local now = now_ms()

local function read(id)
  local raw = call('HGET', nodes, id)
  return raw and cjson.decode(raw)
end

-- Return the records of nodes by id; an id without a record has none.
local function read_all(ids)
  local found = {}
  for from = 1, #ids, PAGE do
    local texts = call('HMGET', nodes, unpack(ids, from, math.min(from + PAGE - 1, #ids)))
    for i, text in ipairs(texts) do
      if text then found[ids[from + i - 1]] = cjson.decode(text) end
    end
  end
  return found
end

local function write(id, node) call('HSET', nodes, id, cjson.encode(node)) end

local function note(event, detail)
  call('XADD', events, 'MAXLEN', '~', MAX_EVENTS, '*', 'event', event, 'detail', detail or '', 'ms', now)
end

-- Return all facts that the scripts decide by, in one read.
local function facts()
  local v = call('HMGET', job, 'state', 'stop', 'deadline', 'fail_limit', 'early_limit',
                 'failed', 'done', 'pending', 'phase', 'n', 'ttl_s', 'schema', 'seen_ms', 'node_records', 'start_by', 'peak_kb')
  if not v[1] then return nil end
  return {state = v[1], stop = v[2] or '', deadline = tonumber(v[3]), fail_limit = tonumber(v[4]),
          early_limit = tonumber(v[5]), failed = tonumber(v[6]), done = tonumber(v[7]),
          pending = tonumber(v[8]), phase = v[9], n = tonumber(v[10]), ttl_s = tonumber(v[11]),
          schema = tonumber(v[12]), seen_ms = tonumber(v[13]), node_records = tonumber(v[14] or 10000),
          start_by = tonumber(v[15] or 0), peak_kb = tonumber(v[16] or 0)}
end

local TERMINAL = {succeeded = true, failed = true, expired = true, cancelled = true}
-- Reasons that end the items and not the job: the partials are merged into an answer.
local MERGES = {[''] = true, early = true, budget = true}

-- Renew keys that work has just written: a key that was empty came into being without an expiry.
-- A key that each node writes is renewed at its first write and by sweeps: the job's index of sweeps
-- has no expiry.
local function keep(...)
  for _, key in ipairs({...}) do call('EXPIRE', key, OPEN_S) end
end

-- Count a node that begins to wait for a time or an event (1), or no longer waits (-1), by reason.
local function count_parked(why, by)
  call('HINCRBY', job, 'parked', by)
  local field = 'why:' .. why
  if call('HEXISTS', job, field) == 0 and (by < 0 or call('HLEN', job) >= MAX_FIELDS) then
    field = OTHER_REASONS
  end
  if call('HINCRBY', job, field, by) <= 0 then call('HDEL', job, field) end
end

-- Keep the records of ended nodes; beyond `node_records` the oldest ones are only counted.
local function keep_records(f, ids)
  local kept = call('RPUSH', ended, unpack(ids))
  if kept == #ids then keep(ended) end
  -- Two for each, so that a list that was too long becomes short without a long script.
  local too_many = math.min(2 * #ids, kept - f.node_records)
  if too_many > 0 then
    call('HINCRBY', job, 'pruned', call('HDEL', nodes, unpack(call('LPOP', ended, too_many))))
  end
end

-- Return the record of a node that the token holds.  When a lease has run out, the holder keeps the
-- node until another process claims it.
local function held(id, token, node)
  node = node or read(id)
  if node and node.k == token and (node.s == 'r' or (node.s == 'q' and node.lost)) then return node end
end

local function stop(f, reason, detail)
  f.stop = reason
  call('HSET', job, 'stop', reason, 'stop_ms', now)
  note('stopping', reason .. (detail and detail ~= '' and (': ' .. detail) or ''))
end

-- Whether no worker has begun a job within its queue_timeout.
local function overdue_in_queue(f) return f.start_by > 0 and f.state == 'pending' and now >= f.start_by end

-- End a job early: at its deadline, when no worker begins it, when too many items failed, or by early termination.
local function judge(f)
  if f.stop ~= '' then return end
  if f.deadline > 0 and now >= f.deadline then stop(f, 'expired')
  elseif overdue_in_queue(f) then
    call('HSET', job, 'stop_why', 'queue_timeout')
    stop(f, 'expired', 'no worker has begun it within its queue_timeout')
  elseif f.fail_limit >= 0 and f.failed > f.fail_limit then stop(f, 'failed', f.failed .. (f.failed == 1 and ' item failed' or ' items failed'))
  elseif f.early_limit > 0 and f.phase == 'process' and f.done >= f.early_limit then stop(f, 'early')
  end
end

-- Take nodes out of the keys of nodes that wait or run.
local function retire(...)
  call('ZREM', due, ...)
  call('ZREM', waiting, ...)
  call('HDEL', inflight, ...)
end

-- Count the death of a process that ran this item.
-- `before`: earlier deaths with several items in flight.   `over`: the item must not run again.
local function count_death(index, before, by, over)
  local raw = call('HGET', deaths, index)
  local death = raw and cjson.decode(raw) or {n = before}
  death.n, death.by, death.over = death.n + 1, by, over or death.over
  call('HSET', deaths, index, cjson.encode(death))
  keep(deaths)
end

-- Return the failed items of a range: indexes, and ranges 'lo:hi' that reach into it.  With `most`,
-- only the first ones.
local function failed_in(lo, hi, most)
  local found = call('ZRANGEBYSCORE', failed, lo, '(' .. hi, 'LIMIT', 0, most or -1)
  local before = call('ZREVRANGEBYSCORE', failed, '(' .. lo, '-inf', 'LIMIT', 0, 1)[1]
  local reach = before and tonumber(string.match(before, ':(%d+)$'))
  if reach and reach > lo then table.insert(found, 1, before) end
  return found
end

-- Return the number of items of a range that are skipped when it does not run.  Items already
-- counted as failed stay failed.
local function unfailed(f, lo, hi)
  local known = 0
  if f.failed == 0 then return hi - lo end
  if call('HEXISTS', job, 'failed_ranges') == 0 then
    known = call('ZCOUNT', failed, lo, '(' .. hi)
  else
    for _, name in ipairs(failed_in(lo, hi)) do
      local from, to = string.match(name, '^(%d+):?(%d*)$')
      from, to = tonumber(from), tonumber(to)
      known = known + math.min(hi, to or from + 1) - math.max(lo, from)
    end
  end
  return hi - lo - known
end

-- Skip nodes, at most a page of them: they will not run.  `records` has their records by id.
local function skip_nodes(f, ids, records)
  if #ids == 0 then return end
  local fields, listed, items = {}, {}, 0
  for _, id in ipairs(ids) do
    local node = records[id]
    if node.s == 'p' then count_parked(node.why, -1) end
    node.s, node.why, node.mid = 'k', f.stop, node.lo
    fields[#fields + 1] = id
    fields[#fields + 1] = cjson.encode(node)
    if id ~= 'root' then listed[#listed + 1] = id end
    if id ~= 'merge' then items = items + unfailed(f, node.lo, node.hi) end
  end
  call('HSET', nodes, unpack(fields))
  retire(unpack(ids))
  if #listed > 0 then keep_records(f, listed) end
  call('HINCRBY', job, 'nodes_skipped', #ids)
  call('HINCRBY', job, 'skipped', items)
  f.pending = call('HINCRBY', job, 'pending', -#ids)
end

-- Skip nodes that wait; with `force`, fence running ones too.  At most two pages in one script.
local function skip_waiting(f, force)
  for _, key in ipairs({waiting, due}) do
    local first, ids = call('ZRANGE', key, 0, PAGE - 1), {}
    local records = read_all(first)
    for _, id in ipairs(first) do
      if records[id] and (records[id].s ~= 'r' or force) then ids[#ids + 1] = id end
    end
    skip_nodes(f, ids, records)
  end
end

local function close(f, state)
  if f.phase == 'validate' then call('HSET', job, 'skipped', f.n - f.failed) end
  local v = call('HMGET', job, 'done', 'failed', 'skipped')
  if tonumber(v[1]) + tonumber(v[2]) + tonumber(v[3]) ~= f.n then
    state = 'failed'
    call('HSETNX', job, 'error', cjson.encode({type = 'LedgerError', traceback = '',
      message = 'done + failed + skipped = ' .. v[1] .. ' + ' .. v[2] .. ' + ' .. v[3] .. ', not ' .. f.n}))
  end
  f.state = state
  call('HSET', job, 'state', state, 'closed_ms', now)
  call('UNLINK', due, waiting, inflight, splits, deaths)
  local left = {job, nodes, pieces, blobs, empty, events, ended}
  if tonumber(v[2]) == 0 then
    call('UNLINK', items, blocks)
  else
    for _, key in ipairs({failed, failures, quarantine, items, blocks}) do left[#left + 1] = key end
  end
  note('closed', state)
  for _, key in ipairs(left) do call('EXPIRE', key, f.ttl_s) end
end

-- Let a node wait for its message; `waiting` has the time since when.
local function wait_for_message(id, node)
  if node.s == 'p' then count_parked(node.why, -1) end
  node.s, node.m = 'q', (node.m or -1) + 1
  write(id, node)
  call('ZREM', due, id)
  call('ZADD', waiting, now, id)
end

-- Return the JSON of a new node with the whole range of a job, in state q or p.
local function whole(state, n, task, why)
  return cjson.encode({s = state, e = 0, m = state == 'q' and 0 or nil, wt = state == 'p' and 1 or nil,
    lo = 0, hi = n, d = 0, p = '', sp = '', ix = 0, t = task, why = why, rs = 0})
end

-- Register new nodes that may run now, by id and JSON.  The caller counts them as pending.
local function queue_nodes(ids, texts)
  local fields, members = {}, {}
  for i, id in ipairs(ids) do
    fields[#fields + 1] = id
    fields[#fields + 1] = texts[i]
    members[#members + 1] = now
    members[#members + 1] = id
    if #fields == 2 * PAGE or i == #ids then
      call('HSET', nodes, unpack(fields))
      call('ZADD', waiting, unpack(members))
      fields, members = {}, {}
    end
  end
end

-- Register a new node that may run later; a sweep sends its message at that time.  The caller counts
-- it as pending.
local function park_node(id, text, at)
  call('HSET', nodes, id, text)
  count_parked(cjson.decode(text).why, 1)
  call('ZADD', due, at, id)
end

-- Called when nothing is pending: the next phase, the root merge, or the end.
-- Returns the outcome and, when a node now waits for its message, that node's id.
local function finish_tree(f, root_task)
  -- Empty and skipped items do not count.  The limit is n if the request tolerates that all fail.
  if MERGES[f.stop] and f.phase == 'process' and f.done == 0 and f.failed > 0 and f.fail_limit < f.n then
    stop(f, 'failed', 'no item succeeded')
  end
  if not MERGES[f.stop] then
    close(f, f.stop)
    return 'closed', ''
  end
  local id = f.phase == 'validate' and 'process' or 'merge'
  if id == 'process' then
    call('HSET', job, 'phase', 'process', 'pending', 1)
    note('validated')
  else
    call('HSET', job, 'state', 'merging', 'pending', 1)
    note('merging')
  end
  queue_nodes({id}, {whole('q', f.n, root_task, '')})
  keep(waiting)
  return id, id
end
