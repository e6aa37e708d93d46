-- uses: clock
-- The shared steps of a bucket's limits.  KEYS: grant, takers, line of waiters
-- during a pause, then one hash for each limit.
--
-- A limit's hash:
-- - v      level of the pacing bucket at time t (negative: booked ahead)
-- - t      time of the level
-- - hold   time before which no amount is granted
-- - sum    sum of the cells that count
-- - tail   number of the oldest cell that counts
-- - head   number of the newest cell
-- - c<k>   amount taken in cell k, which is the slice of time from k * width on
-- - new<urgency>, back<urgency>  time at which the bucket has refilled the amount of the last
--          waiter in line; `back` is the line of waiters that return
-- - ratio  average share of the amounts taken that was used
-- - till   time before which the hash does not expire
-- A cell stays until all of it is older than the window and its guard.  Times are microseconds of
-- the server.
local call, floor, format, CELLS = redis.call, math.floor, string.format, 256
local now = now_us()

local function exact(number) return format('%.17g', number) end
local function name(cell) return format('c%.0f', cell) end

local function read(key, limit, window, capacity, guard)
  local width = window / CELLS
  local b = {key = key, limit = limit, capacity = capacity, rate = limit / window, width = width,
             window = window + guard, here = name(floor(now / width)), gone = {}}
  local v = call('HMGET', key, 'v', 't', 'hold', 'sum', 'tail', 'head', 'till', b.here, 'ratio')
  b.hold, b.sum, b.till = tonumber(v[3] or 0), tonumber(v[4] or 0), tonumber(v[7] or 0)
  b.taken, b.ratio = tonumber(v[8] or 0), tonumber(v[9] or 1)
  b.v = tonumber(v[1] or capacity) + math.max(0, now - tonumber(v[2] or now)) * b.rate
  b.full, b.v = (b.v - capacity) / b.rate, math.min(capacity, b.v)
  b.tail, b.head = floor((now - b.window) / width), tonumber(v[6] or -1)
  if v[5] then
    -- Cells that have left the window since the last take.
    for k = tonumber(v[5]), math.min(b.tail - 1, b.head) do b.gone[#b.gone + 1] = name(k) end
    for from = 1, #b.gone, 200 do
      local left = call('HMGET', key, unpack(b.gone, from, math.min(from + 199, #b.gone)))
      for _, amount in ipairs(left) do b.sum = b.sum - tonumber(amount or 0) end
    end
    b.tail = math.max(b.tail, tonumber(v[5]))
  end
  -- If no cell counts, the next one is the oldest.
  if b.head < b.tail then b.tail, b.sum = floor(now / width), 0 end
  return b
end

-- Returns the time at which the window has room: its oldest cells must leave until the sum fits.
local function leaves(b, room)
  local left, k, more = b.sum, b.tail, 8
  while left > room + 1e-9 and k <= b.head do
    local fields = {}
    for i = 1, more do fields[i] = name(k + i - 1) end
    for _, amount in ipairs(call('HMGET', b.key, unpack(fields))) do
      left, k = left - tonumber(amount or 0), k + 1
      if left <= room + 1e-9 then break end
    end
    more = math.min(2 * more, 128)
  end
  return k == b.tail and now or k * b.width + b.window
end

local function put(b, amount, at)
  b.v = b.v - amount
  b.sum = b.sum + amount
  local cell = floor(at / b.width)
  local field, taken = name(cell), b.taken
  if field == b.here then
    b.taken = b.taken + amount
  else
    taken = tonumber(call('HGET', b.key, field) or 0)
  end
  b.tail, b.head = math.min(b.tail, cell), math.max(b.head, cell)
  for from = 1, #b.gone, 200 do
    call('HDEL', b.key, unpack(b.gone, from, math.min(from + 199, #b.gone)))
  end
  b.gone = {}
  call('HSET', b.key, field, taken + amount, 'v', b.v, 't', now, 'sum', b.sum, 'tail', b.tail,
       'head', b.head)
  -- The hash may expire a minute after the bucket is full and the window empty.  The expiry is put
  -- off by half a minute at a time.
  local till = math.max(at + (b.capacity - b.v) / b.rate, at + b.window, b.hold) + 30000000
  if till > b.till then
    b.till = till + 30000000
    call('HSET', b.key, 'till', b.till)
    call('PEXPIRE', b.key, math.ceil((b.till - now) / 1000))
  end
  return cell
end
