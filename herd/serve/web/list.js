// The keys of the list of conversations: from the search to what was found, up and down, and back.

import { $ } from "./view.js";

export function listenToList({ showList, openNew }) {
  const buttons = () => [...$("conversations").querySelectorAll("button.open")];
  $("search").addEventListener("input", showList);
  $("search").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" && event.key !== "ArrowDown") return;
    event.preventDefault();
    const [first] = buttons();
    const isNew = event.key === "Enter" && (!event.target.value.trim() || !first);
    if (event.key === "ArrowDown") first?.focus();
    else if (isNew) openNew();
    else first.click();
    if (event.key === "Enter") {
      event.target.value = "";
      showList();
    }
  });
  $("conversations").addEventListener("keydown", (event) => {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    const all = buttons();
    (all[all.indexOf(event.target) + step] ?? (step < 0 ? $("search") : event.target)).focus();
  });
}
