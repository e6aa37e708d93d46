-- The shared steps of a bucket's limits.  KEYS: the reservation, the takers, then one hash for each limit.
--
-- A limit's hash:  v  level of the pacing bucket at time t (negative: booked ahead)    hold  nothing passes before
--   sum  what the cells hold    tail  oldest cell that counts    c<k>  taken in cell k: a slice of time, k * width
--   turn<class>  when the last of those who wait will be served
-- A cell stays until all of it is older than the window and its guard.  Times are microseconds of the server.
local call, CELLS = redis.call, 256
local t = call('TIME')
local now = tonumber(t[1]) * 1000000 + tonumber(t[2])

local function exact(number) return string.format('%.17g', number) end

local function read(key, limit, window, capacity, guard)
  local v = call('HMGET', key, 'v', 't', 'hold', 'sum', 'tail')
  local b = {key = key, limit = limit, capacity = capacity, rate = limit / window, width = window / CELLS,
             window = window + guard, hold = tonumber(v[3] or '0'), sum = tonumber(v[4] or '0'), gone = {}}
  b.v = math.min(capacity, tonumber(v[1] or capacity) + math.max(0, now - tonumber(v[2] or now)) * b.rate)
  b.tail = math.floor((now - b.window) / b.width)
  if v[5] then
    -- What has left the window since the last take.
    for k = tonumber(v[5]), b.tail - 1 do b.gone[#b.gone + 1] = 'c' .. k end
    for from = 1, #b.gone, 200 do
      local left = call('HMGET', key, unpack(b.gone, from, math.min(from + 199, #b.gone)))
      for _, amount in ipairs(left) do b.sum = b.sum - tonumber(amount or 0) end
    end
    b.tail = math.max(b.tail, tonumber(v[5]))
  end
  return b
end

-- When the window has room: as many of its oldest cells must leave as hold what is too much.
local function leaves(b, room)
  local left, k = b.sum, b.tail
  while left > room + 1e-9 do
    local fields = {}
    for i = 0, 31 do fields[#fields + 1] = 'c' .. (k + i) end
    for _, amount in ipairs(call('HMGET', b.key, unpack(fields))) do
      left, k = left - tonumber(amount or 0), k + 1
      if left <= room + 1e-9 then break end
    end
    if k > (now + 86400000000) / b.width then break end
  end
  return k == b.tail and now or k * b.width + b.window
end

local function put(b, amount, at)
  b.v = b.v - amount
  b.sum = b.sum + amount
  local cell = math.floor(at / b.width)
  for from = 1, #b.gone, 200 do call('HDEL', b.key, unpack(b.gone, from, math.min(from + 199, #b.gone))) end
  b.gone = {}
  call('HINCRBYFLOAT', b.key, 'c' .. string.format('%.0f', cell), exact(amount))
  call('HSET', b.key, 'v', exact(b.v), 't', exact(now), 'sum', exact(b.sum), 'tail', exact(b.tail))
  local full = at + (b.capacity - b.v) / b.rate
  call('PEXPIRE', b.key, math.ceil((math.max(full, at + b.window, b.hold) - now) / 1000) + 60000)
  return cell
end
