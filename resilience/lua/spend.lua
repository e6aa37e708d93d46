-- uses: clock
-- The shared steps of a budget.  KEYS: accounts, folded, charges, leases, labels.  ARGV[1]: ms for which all of it is kept.
--
-- An account is JSON:  of  its parent    got  what it began with    free  may still be charged or carved    held  reserved by
-- charges in flight    spent  used, as far as it is known.  All but the first are unit -> amount; a unit without `free` is not limited.
-- A folded account is JSON: of, got.  The rest of it has moved to its nearest open ancestor, and so does all that still comes.
-- A charge is JSON: account, amounts.  It is in flight while it is in leases; afterwards it has lapsed, until somebody settles it.
local accounts, folded, charges, leases, labels, call = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], redis.call
local text, format = cjson.encode, string.format
-- Three times 0.1 fit into 0.3: the share of an amount that rounding may cost.
local CLOSE = 1e-9

local now = now_ms()

-- Every digit counts: cjson would write 14 of them.
local function exact(amounts)
  local each = {}
  for unit, amount in pairs(amounts) do each[#each + 1] = text(unit) .. ':' .. format('%.17g', amount) end
  return '{' .. table.concat(each, ',') .. '}'
end

-- An account, or its nearest open ancestor; nothing when it never was.
local function find(name)
  local open = call('HGET', accounts, name)
  if open then
    local account = cjson.decode(open)
    account.name = name
    return account
  end
  local gone = call('HGET', folded, name)
  if gone then return find(cjson.decode(gone).of) end
end

local function put(account)
  local parts = '{"of":' .. text(account.of)
  for _, part in ipairs({'got', 'free', 'held', 'spent'}) do parts = parts .. ',"' .. part .. '":' .. exact(account[part]) end
  call('HSET', accounts, account.name, parts .. '}')
end

local function add(account, part, amounts, sign)
  local sums = account[part]
  for unit, amount in pairs(amounts) do
    if sums[unit] or part ~= 'free' then sums[unit] = (sums[unit] or 0) + sign * amount end
    -- What rounding leaves of a reservation is nothing.
    if part == 'held' and sums[unit] <= CLOSE * amount then sums[unit] = nil end
  end
end

local function move(account, amounts, from, to)
  add(account, from, amounts, -1)
  add(account, to, amounts, 1)
end

local function keep()
  for _, key in ipairs(KEYS) do call('PEXPIRE', key, ARGV[1]) end
end

-- Whoever held it may have used it: it is spent.
local function lapse(id)
  call('ZREM', leases, id)
  local charge = cjson.decode(call('HGET', charges, id))
  local account = find(charge.account)
  move(account, charge.amounts, 'held', 'spent')
  put(account)
end

-- A hundred at a time, so that no caller pays for the death of a thousand; those that wait for their turn are held, which
-- binds as much.
for _, id in ipairs(call('ZRANGEBYSCORE', leases, '-inf', now, 'LIMIT', 0, 100)) do lapse(id) end
