// Filter of the cards by words, group and "only captions that differ".
// The address of the page contains the state of the filter, as in #group=worst&find=red&wrong=1.
// A filtered view can therefore be shared as a link.
const find = document.getElementById("find"), group = document.getElementById("group");
const wrong = document.getElementById("wrong"), shown = document.getElementById("shown");
const cards = [...document.querySelectorAll("figure")];
function apply() {
  const words = find.value.toLowerCase().split(/\s+/).filter(Boolean);
  let count = 0;
  for (const card of cards) {
    const matches = words.every(word => (card.dataset.text || "").includes(word))
      && (!group.value || (card.dataset.groups || "").split("|").includes(group.value))
      && (!wrong.checked || card.classList.contains("bad"));
    card.hidden = !matches;
    count += matches;
  }
  shown.value = count + " of " + cards.length;
}
function saveToAddress() {
  const state = new URLSearchParams();
  if (find.value) state.set("find", find.value);
  if (group.value) state.set("group", group.value);
  if (wrong.checked) state.set("wrong", "1");
  history.replaceState(null, "", "#" + state);
  apply();
}
function readFromAddress() {
  const state = new URLSearchParams(location.hash.slice(1));
  find.value = state.get("find") || "";
  group.value = state.get("group") || "";
  wrong.checked = state.has("wrong");
  apply();
}
document.getElementById("filter").addEventListener("input", saveToAddress);
document.getElementById("filter").addEventListener("submit", event => event.preventDefault());
addEventListener("hashchange", readFromAddress);
readFromAddress();
