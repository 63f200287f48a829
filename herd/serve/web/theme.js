// Before the first paint, so that a page in the dark does not flash: the chosen theme, or none for the system's. Not a module, since those wait.
{
  let theme;
  try {
    theme = JSON.parse(localStorage.getItem("herd.preferences"))?.theme;
  } catch {
    // no storage, no choice
  }
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
}
