// Not a module, and before the style sheet: a chosen theme is set before anything is painted.
{
  const theme = localStorage.getItem("gemlax.theme");
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
}
