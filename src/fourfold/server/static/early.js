// Before the first paint: the theme and the language, so that neither flashes. A module would run too late.
// What was chosen by a switch is kept in localStorage; without a choice the browser's own preference holds.
(() => {
  const chosen = (key) => {
    try {
      return localStorage.getItem(key);
    } catch {
      return null; // storage is blocked: the browser's preference
    }
  };
  const root = document.documentElement;
  const dark = matchMedia("(prefers-color-scheme: dark)");
  root.dataset.theme = chosen("fourfold.theme") ?? (dark.matches ? "dark" : "light");
  root.lang = (chosen("fourfold.language") ?? navigator.language).startsWith("zh") ? "zh-CN" : "en";
})();
