// The settings dialog: how a conversation (or one lane of it) is sampled, what the browser keeps, and the theme.

import { NUMBERS } from "./store.js";
import { $ } from "./view.js";

const THEMES = ["system", "light", "dark"];

/** Open the dialog on a lane's settings. They change as they are typed; `changed()` follows each change. */
export function openSettings({ settings, preferences, title, changed }) {
  const form = $("settings-form");
  const field = form.elements;
  $("settings-title").textContent = title;
  field.system.value = settings.system;
  for (const name of NUMBERS) field[name].value = settings[name] ?? "";
  field.stop.value = settings.stop.join("\n");
  field.key.value = preferences.key ?? "";
  form.oninput = () => {
    settings.system = field.system.value;
    for (const name of NUMBERS) settings[name] = field[name].value === "" || !field[name].validity.valid ? null : field[name].valueAsNumber;
    settings.stop = field.stop.value.split("\n").filter(Boolean);
    preferences.key = field.key.value.trim();
    changed();
  };
  $("settings").showModal();
}

export function applyTheme(theme = "system") {
  if (theme === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  const label = `Theme: ${theme === "system" ? "as the system" : theme}`;
  $("theme").setAttribute("aria-label", label);
  $("theme").title = label;
}

export function nextTheme(theme = "system") {
  return THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
}

/** Offer text as a file. */
export function download(name, text) {
  const url = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  const link = Object.assign(document.createElement("a"), { href: url, download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}
