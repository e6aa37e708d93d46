-- uses: clock
-- Read the decisions that guards made without Redis.  KEYS: counts.
-- Returns {ms since the last report, kind, number, ...}.
local found = redis.call('HGETALL', KEYS[1])
local answer = {0}
for i = 1, #found, 2 do
  if found[i] == 'at' then
    answer[1] = now_ms() - tonumber(found[i + 1])
  else
    answer[#answer + 1], answer[#answer + 2] = found[i], found[i + 1]
  end
end
return answer
