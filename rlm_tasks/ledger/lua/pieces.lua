-- Read partials in item order.  ARGV: from, to, largest number.
-- Returns {"lo:hi", packed, "lo:hi", packed, ...}.
local found = call('ZRANGEBYSCORE', pieces, ARGV[1], '(' .. ARGV[2], 'LIMIT', 0, ARGV[3])
if #found == 0 then return {} end
local packed = call('HMGET', blobs, unpack(found))
local answer = {}
for i, range in ipairs(found) do
  answer[2 * i - 1] = range
  answer[2 * i] = packed[i] or ''
end
return answer
