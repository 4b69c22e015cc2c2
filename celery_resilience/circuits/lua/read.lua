-- ARGV: names. Returns Redis's time, and version and text of each.

local answer = {now}
for _, name in ipairs(ARGV) do
  table.insert(answer, circuit(name))
end
return answer
