-- uses: clock
-- The shared steps of a budget.  KEYS: accounts, folded, charges, leases, labels.
-- ARGV[1]: ms for which all keys are kept.
--
-- An account is JSON:
-- - of     name of its parent
-- - got    amounts at its start
-- - free   amounts that may still be charged or carved
-- - held   amounts reserved by charges in flight
-- - spent  amounts used, as far as known
--
-- All but `of` are unit -> amount; a unit without `free` has no limit.
-- A folded account is JSON: of, got.  Its other amounts have moved to its nearest open ancestor,
-- and later charges count there.
-- A charge is JSON: account, amounts.  It is in flight while it is in leases; then it has lapsed,
-- until it is settled.
local accounts, folded, charges, leases, labels = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local call, text, format = redis.call, cjson.encode, string.format
-- The share of an amount that rounding may cost, so that three times 0.1 fits into 0.3.
local CLOSE = 1e-9

local now = now_ms()

-- JSON with all digits; cjson would write only 14.
local function exact(amounts)
  local each = {}
  for unit, amount in pairs(amounts) do
    each[#each + 1] = text(unit) .. ':' .. format('%.17g', amount)
  end
  return '{' .. table.concat(each, ',') .. '}'
end

-- Returns an account, or its nearest open ancestor; nil if it never existed.
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
  for _, part in ipairs({'got', 'free', 'held', 'spent'}) do
    parts = parts .. ',"' .. part .. '":' .. exact(account[part])
  end
  call('HSET', accounts, account.name, parts .. '}')
end

local function add(account, part, amounts, sign)
  local sums = account[part]
  for unit, amount in pairs(amounts) do
    if sums[unit] or part ~= 'free' then sums[unit] = (sums[unit] or 0) + sign * amount end
    -- The rest of a reservation that only rounding left is zero.
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

-- A lapsed charge counts as spent, because its holder may have used it.
local function lapse(id)
  call('ZREM', leases, id)
  local charge = cjson.decode(call('HGET', charges, id))
  local account = find(charge.account)
  move(account, charge.amounts, 'held', 'spent')
  put(account)
end

-- At most 100 charges lapse in one call, so that one caller does not pay for the end of 1,000.  The
-- others stay held, which limits as much.
for _, id in ipairs(call('ZRANGEBYSCORE', leases, '-inf', now, 'LIMIT', 0, 100)) do lapse(id) end
